"""Images and masks in files: formats, layouts of data sets, and cases of them."""
