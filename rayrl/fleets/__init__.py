"""Fleets: replicas of one kind behind a router, and what a run keeps of them.

    fleet.py          the callers' side: calls, weights, readiness
    router.py         leases replicas to callers, and scales the fleet
    members.py        health of each replica
    replicas.py       start and end of replicas on Ray
    services.py       the fleets of a run, each started when it is first needed
    control.py        sizes by hand and the end of a run; sizes.py parses them
    connection.py     which cluster a run uses
    coreset.py        shards of the embeddings that the selection asks
    simulated.py      services without models
    actors.py         types of Ray's handles

Clusters of several nodes on one machine, for tests, rehearsals and benches, are in `local_cluster`, `local_network`
(hosts whose links can be cut) and `local_faults` (faults of a run, and what they left).
"""
