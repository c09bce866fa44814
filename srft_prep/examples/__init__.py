"""The project's own small data set: scripted attempts at planted bugs, and a tokenizer for them."""
