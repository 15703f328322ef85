"""What benchmarks/fuzz.py and benchmarks/faults.py are made of."""
