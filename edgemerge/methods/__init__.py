"""The merge methods: what each needs, and what it does to blocks of float32."""
