"""What frozen encoders are worth: retrieval, classification and dense tasks, and a student against its teachers."""
