"""Load generators and measurements for any OpenAI-compatible server."""
