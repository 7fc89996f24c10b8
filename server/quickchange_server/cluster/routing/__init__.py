"""Routing of requests to engine replicas.

placement       an order of preference; pure
routing_memory  what a router knows between replicas' reports; pure
request_router  both behind Ray Serve's interface
"""
