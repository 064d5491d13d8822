"""The guard: a process that owns the embedded servers, so that none of them outlives whoever asked for them.

The problem: Valkey and Postgres outlive a parent that dies of SIGKILL, because nobody is left to stop them. The guard runs in a session of its own
(a Ctrl-C in the terminal reaches neither it nor the servers), starts the servers as its children, and then waits on a pipe whose other end only the
parent holds. The kernel closes that end however the parent dies; the guard sees end-of-file, stops the servers, removes what was temporary, and
ends. Should the guard itself be killed, Linux signals the servers.

    parent --- pipe: orders, and end-of-file when it dies ---> guard ---> valkey-server
           <-- pipe: progress, then `ready` or `failed` ------       ---> postgres

The guard has one thread, because it forks; servers start side by side as generators that yield wherever they wait.
It runs in an isolated interpreter without site-packages, so these modules use the standard library only.
"""
