"""Linear layers on the tile registers of x86 servers (AMX), whose products of matrices are 8 to 16 times AVX-512's."""
