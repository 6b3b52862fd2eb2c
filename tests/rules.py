"""An evaluation function that tests can recompute: characters of each response."""


def size(prompts, responses, rows):
    return [float(len(response)) for response in responses]
