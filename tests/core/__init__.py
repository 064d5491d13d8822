"""Tests of the core: gate, trip evaluator, buffer, drainer and what they are made of."""
