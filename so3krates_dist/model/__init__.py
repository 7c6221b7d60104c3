"""The models and what they are made of: graph in, per-atom energies out, forces and stress by differentiation."""
