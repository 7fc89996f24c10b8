"""Structured output: which texts a request allows, checked before admission.

asked       what a request's fields ask for
keywords    which JSON-schema keywords are enforced; the others are refused by name
grammars    the library that knows which tokens may follow (llguidance)
checker     compiles what clients send in a process of its own, which can be ended
places      where in a schema the fault lies that keeps it from compiling
checks      all of it for the event loop: cached, at most one compilation of the same content
"""
