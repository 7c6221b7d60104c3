"""Using a trained model: the ASE calculator, molecular dynamics, pictures of its attention."""
