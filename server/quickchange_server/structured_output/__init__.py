"""Structured output: grammars that constrain the generated text, validated before admission.

schema_keywords    JSON-schema keywords that are enforced; others are refused by name
grammar            compilation and token masks by llguidance
compiler           the protocols that the engine uses
validator          cached validation for the event loop
validator_process  compilation in a separate process, which can be killed
fault_location     the part of a schema that keeps it from compiling
"""
