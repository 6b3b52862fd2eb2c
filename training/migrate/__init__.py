"""Commands of the projects that this one follows -> commands here; one table of flags for each of them.

deepspeed_chat.py, alpaca_rlhf.py, ...   their flags and defaults as data, and what becomes of each
program.py                               what such a table is made of
predecessors.py                          all tables; the flags that the step programs take as they are
shell/                                   a command or a script as a shell reads it
translate.py, __main__.py                python -m training.migrate "deepspeed ... main.py ..."
reward_model.py      python -m training.migrate.reward_model: their reward models -> a folder of step 2
"""
