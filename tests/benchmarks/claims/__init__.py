"""Does each method do what its paper claims? Four experiments, resumable, with their searches and controls."""
