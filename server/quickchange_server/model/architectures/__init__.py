"""What kinds of models need beyond the two seams: positions, experts, states between steps."""
