"""What turns state into something a person can look at; commands hand it data."""
