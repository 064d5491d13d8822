"""Mollifier smooths bursts of job triggers: it notices them, holds the overflow, and drains it fairly."""
