"""Tables of a step on the host: its shape, its rows, its blocks, its states and its sampling."""
