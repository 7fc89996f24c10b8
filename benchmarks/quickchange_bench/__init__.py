"""Load generators and measurements; they drive any OpenAI-compatible server."""
