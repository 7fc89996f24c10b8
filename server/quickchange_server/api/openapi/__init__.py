"""Models and declarations of answers, from which FastAPI makes the OpenAPI document."""
