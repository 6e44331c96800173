"""How a trained model is used: the class that people import."""
