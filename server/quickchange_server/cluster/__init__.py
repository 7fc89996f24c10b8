"""Several machines: everything that knows Ray, and what routes and plans for many replicas."""
