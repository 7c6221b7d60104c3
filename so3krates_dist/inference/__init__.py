"""Using a trained model: the ASE calculator and molecular dynamics."""
