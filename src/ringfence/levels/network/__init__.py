"""The network of a sandbox that has "nat": a gateway outside it that judges each flow, and opens it on its behalf.

A sandbox's network namespace has no interface but lo, and no route leads out of it: whatever its workload sends,
wherever to, is delivered to the gateway's own sockets in there. Only the gateway can reach the world, by sockets of
the host's that it connects after it has judged the destination. So what the gateway doesn't open can't be reached, by
any protocol, address or trick with routes, and the host's own network needs no interface, rule, sysctl or package.

    policy    which destinations are open, by address and by name
    dns       messages of DNS, from hostile sides
    packets   IP, TCP, UDP and ICMP headers, as far as the gateway makes or reads them
    inside    what a sandbox's network namespace is given before its command starts
    tap       what it takes beside where the sandbox is a guest
    resolver  the names that a sandbox may resolve
    gateway   flows, and the thread that moves their bytes
    session   all of it for one sandbox: what a level uses
"""
