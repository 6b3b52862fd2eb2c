"""What train.py adds to the steps: flags for all of them, own data, the time it will take, what it shows at its end."""
