"""Lowering: fx modules to the torch-free Program, weight readers, and the shared memory planner."""
