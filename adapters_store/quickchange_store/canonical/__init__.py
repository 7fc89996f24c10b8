"""The one form in which every adapter is stored and served."""
