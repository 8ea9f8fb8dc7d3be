"""Training SAEs: many sites from one forward pass of the model. `trainer.train_saes` is the way in."""
