"""The engine's followers: processes that hold the other parts of its model."""
