"""From an admitted request to the text of its answer, without HTTP."""
