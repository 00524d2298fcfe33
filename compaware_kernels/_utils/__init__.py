"""Tables, files, figures and dtypes: what every room may use, and what knows none of them."""
