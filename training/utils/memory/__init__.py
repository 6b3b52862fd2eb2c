"""What a run needs and what there is: the plan, its parts by step and ZeRO stage, memory while it runs."""
