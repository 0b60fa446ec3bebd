"""How close decoding comes to what the memory of the machine allows."""
