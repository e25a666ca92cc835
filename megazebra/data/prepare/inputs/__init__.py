"""What is read: files, the tasks they are cut into, and the records in them."""
