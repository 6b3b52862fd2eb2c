"""A script means here what bash makes of it; what can not be known stays for the shell, and is said."""

import os
import subprocess

import pytest

from training.migrate.__main__ import filled, parse_flags
from training.migrate.shell.command import read_command
from training.migrate.translate import translate
from training.utils.errors import UserError
from training.utils.run.folders import deepspeed_launcher

STEP1 = "training/step1_supervised_finetuning/main.py"
# Prints its arguments and what it has in its environment, a line each
STUB = """deepspeed() { printf '%s\\n' "$@" >&3; printf 'XX %s\\n' $(env | grep ^XX_ | sort) >&3; }; export -f deepspeed
exec 3>out; bash run.sh "$@" """
LINE = '\ndeepspeed x/main.py --a "$A" --b $B --c ${C:-3}\n'
CONDITIONS = [
    '[ "$1" == "" ]', '[ -z "$1" ]', '[ -n "$2" ]', "[[ $1 = a* ]]", 'test "$1" = 2', '[ "$1" -gt 1 ]', "[ $# -ge 2 ]",
    '[ "$1" != "" ] && [ "$2" = 3 ]', '[[ "$1" == 2 && "$2" == 3 ]]', "[[ ( $1 == 2 || $1 == 7 ) && $2 -eq 3 ]]",
    '! [ "$1" = 2 ]', '[ ! "$1" = 2 -a "$2" = 3 ]', '[ $1 == "" ]', "(( $# > 1 ))", '[ "$XX_HUGE" = 1 ]', "true",
    '[ "${1:-9}" = 9 ]', '[[ $1 == "a*" ]]', '[[ abc == "$1"* ]]', "[ $1 = a* ]", "[[ $1 == [^b]b* ]]",
]  # fmt: skip
FORMS = [
    "if {}; then B=yes; else B=no; fi",
    "if false; then B=x; elif {}\nthen\n  B=y\nfi",
    "{} && B=yes",
    "{} || B=no",
    "B=$1; {} && {{ B=d; B+=q; }}",
]
SCRIPTS = [
    *(f"A=1\nB=0\n{form.format(condition)}{LINE}" for condition in CONDITIONS for form in FORMS),
    f"A=$1\nB=${{2:-${{1:-7}}}}{LINE}",
    f"A=${{1-x}}\nB=${{A:+s}}\n: ${{C:=8}}{LINE}",
    f"N=5\nA=$((N*2+1))\nB=$(( ($N+1)/4 ))\nC=$((-7/2)){LINE}",
    f"M=facebook/opt-1.3b\nA=${{M##*/}}\nB=${{M%%-*}}\nC=${{M//o/0}}{LINE}",
    f'A="x y"\nB="p q"\nC=${{#A}}{LINE}',
    f"A='a \"b' # it's\nB=$A{LINE}",
    'arr=(1 "2 3" # one\n 4)\narr+=(5)\ndeepspeed x/main.py "${arr[@]}" ${arr[1]} ${#arr[@]} "$@" $# end\n',
    'A=1;B=2\ncmd="deepspeed x/main.py --a $A \\\n  --b $B"\necho $cmd\n$cmd\n',
    'A=1\neval "deepspeed x/main.py --a \\"$A b\\""\n',
    f'case "$1" in "a*"|\\*) A=quoted;; a*) A=ay;; *) A=other;; esac\nB=1{LINE}',
    f"A=$'it\\'s\\t\\x41'\nB=\"$'x'\"{LINE}",
    f"A=1\nB=x\\\ny\n# no more: \\\nB+=z{LINE}",
    f'N=3\neval "A=\\$((N+3))"\ndeclare -i B=2{LINE}',
    f'case "$1" in 2|3) A=two;; a*) A=ay;; *) A=other;; esac\nB=1{LINE}',
    f"f() {{ A=9; }}\nA=1;B=2{LINE}",
    f"A=1;B=2\nshift\nC=$1{LINE}",
    "set -- 7 8\ndeepspeed x/main.py $2 $1\n",
    f"A=1;B=2\n( A=5 )\n{{ B=6; }}{LINE}",
    f'cat > /dev/null <<EOF\nA=5 "it\nEOF\nA=1;B=2{LINE}',
    f'A=1\nB=2\nif [ "$1" == "" ]; then\n if [ "$2" == "" ]; then B=in; fi\n A=out\nfi{LINE}',
    f'export XX_A=1 XX_B="p"\nA=1 ; B=$XX_B\nexport XX_A=2\nunset XX_B\nXX_C=3{LINE}',
    "XX_A=1\nexport XX_A\nXX_A=4 XX_P=3 deepspeed x/main.py x\n",
    f"A=1 # old \\\nA=2\nB=3{LINE}",
    "A='p\\q' # can't \\\nB=\"x\\\ny'\\\nz\"\ndeepspeed x/main.py $A $B --c 3 \\\n --d 'e' \\\n# --f \\\n --g\n",
    *(
        f"N=5\nB=0\nif {test}; then A=1; else A=2; fi{LINE}"
        for test in (
            "[[ N -gt 3 ]]",
            "[[ 2+N -eq 7 ]]",
            '[ "" -eq 0 ]',
            '[[ "" -eq 0 ]]',
            "[ 1_0 -eq 10 ]",
            '[ " 5 " -eq $N ]',
        )
    ),
    "X=p\ndeepspeed x/main.py {a} {} '{a,b}' \"{a,b}\" \\{a,b} a{b,c\n",
    'B=\\{a,b}\nA=(d $((1+1)) $[2*3])\ndeepspeed x/main.py "${A[@]}" $B 10>/dev/null\n',
    "IFS=$'\\n\\t'\nA='--a 1'\ndeepspeed x/main.py $A\n",
    'IFS=,\nA=1,2\ndeepspeed x/main.py $A "$A"\n',
    f"readonly A=1\nA=3\nB=2\ndeclare -r B\nB+=4\nbash -c 'A=5'{LINE}",
    "A=1;B=2\nshopt -s nocasematch\nM=OPT\ncase $M in x);; opt*) A=3;; esac\n[[ $M == opt && opt = $M ]] && B=4\n"
    f"[ $M = opt ] && B=5\nshopt -u nocasematch\n[[ $M == opt ]] || C=6{LINE}",
    "set -ea\nXX_A=3\nset +a\nXX_B=4\nset -o allexport\nXX_C=5\ndeepspeed x/main.py\n",
    "export XX_A=1 XX_B=2\nexport -n XX_A\ndeepspeed x/main.py\n",
    'A=1\ndeepspeed x/main.py "${A:+--l 8}" ${A:+--l 8} ${A:+"--l 8"} ${B:-"d e"} "${B:-\'x\'}" "${B:-"x y"}"\n',
    'A=\'[x]y*z\'\ndeepspeed x/main.py ${A#\\[x]} "${A%\'*z\'}" "${A%\\*z}" "${A#*x]}"\n',
    'A=$"x y"\ncase xy in $"x"*) B=1;; esac\ndeepspeed x/main.py --a $"hi" "$A" $B \'$"z"\' a$"b"\n',
    'A=(a "b c" d)\ndeepspeed x/main.py "${@:2}" ${@:1:1} "${A[@]:1}" ${A[@]:1:1} "${A[*]:1}" "${A[@]:7}" end\n',
    "A=1;B=2\nwhile [[ $# -gt 0 ]]; do case $1 in 2) A=$2; shift;; a*) B=$1;; esac; shift; done\n" + LINE,
    'A=1;B=2\nuntil [ -z "$1" ]; do A="$A,$1"; shift; done\nN=3\nwhile (( N > 1 )); do N=$((N-1)); B+=$N; done\n'
    + LINE,
    "E=1+2\ndeepspeed x/main.py $((E*2)) $(($E*2))\n",
    "A=(a b c)\nI=1\ndeepspeed x/main.py ${A[$I]} ${A[I]} ${A[I+1]} ${A[7]} ${A[-1]} end\n",
    "A=(1 2)\nA=x\nA+=y\nB=()\nB+=z\ndeepspeed x/main.py ${A[@]} ${B[@]}\n",
    f'A=0\nB=0\nO=-eq\n[ 2 $O 2 ] && A=1\n[ "$1" "=" 2 ] && B=2{LINE}',
    "set a b\ndeepspeed x/main.py $@\n",
    "set -ex -o pipefail -- --a -b\ndeepspeed x/main.py $@\n",
    f"A=1;B=2\nA=3 & {{ B=4; }} &\nwait{LINE}",
    f"f() {{ local A=9; }}\nA=1;B=2\nf{LINE}",
    "export XX_A=1\nbash -c 'deepspeed x/main.py $XX_A $1' q r\n",
    "bash -ec 'deepspeed x/main.py'\n",
    "bash -c 'deepspeed x/main.py --a y.py'\n",
    f'A=0\nset -e\n[ "$1" = 7 ] && A=1\nif [ "$1" = 7 ]; then A=2; fi\n! true\n[ 1 = 7 ] || B=3\nfalse || B=4{LINE}',
    *(
        f"A=1;B=2\nset -e\n{test}{LINE}"
        for test in (
            "{ [ a = b ]; } || A=3",
            "if { [ a = b ]; true; }; then A=3; else A=4; fi",
            "! { false; }",
            "false && true",
            "! { true; } && B=4",
            "while { [ $A = 3 ]; }; do A=4; done",
            "{ false && true; }",
            "if [ a = a ]; then [ a = b ] || B=5; fi",
        )
    ),
    "while read -r A; do :; done < <(echo 1)\ndeepspeed x/main.py --a 1 2> >(cat >&2) --b\n",
    f"cat > /dev/null <<EOF\nA=5\n\tEOF\ndeepspeed y/main.py\nEOF\ncat <<-E\n\tE\nA=1;B=2{LINE}",
    "A=( # it's\n1 # one (more\n)\nB=$(echo 1 # it's\n)\ndeepspeed x/main.py ${A[@]}\n",
    "deepspeed x/main.py ${0##*/} ${BASH_SOURCE[0]##*/}\n",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_does_the_same(tmp_path, monkeypatch, script):
    monkeypatch.delenv("XX_HUGE", raising=False)
    path = tmp_path / "run.sh"
    path.write_text(script)
    for arguments in ([], ["2"], ["2", "3"], ["abc", "3"]):
        subprocess.run(["bash", "-c", STUB, "x", *arguments], cwd=tmp_path, check=False, stderr=subprocess.DEVNULL)
        command = read_command(" ".join(["bash", str(path), *arguments]))
        environment = [f"XX {entry}" for entry in sorted(command.environment)] or ["XX "]
        here = [command.script, *command.arguments, *environment]
        assert here == (tmp_path / "out").read_text().splitlines(), arguments


def test_the_environment_here_decides_a_condition(monkeypatch):
    text = f'LR=1e-5; [ "$HUGE" = 1 ] && LR=1e-3; deepspeed {STEP1} --learning_rate $LR'
    monkeypatch.delenv("HUGE", raising=False)
    made = translate(text)
    assert made.arguments[:2] == ["--learning_rate", "1e-5"]
    assert '$HUGE in [ "$HUGE" = 1 ] is taken as empty, it is not set here' in made.lines
    monkeypatch.setenv("HUGE", "1")
    assert translate(text).arguments[:2] == ["--learning_rate", "1e-3"]


def script_of_theirs(folder, *more):
    """As DeepSpeed-Chat's scripts are."""
    (folder / "step1_supervised_finetuning").mkdir(exist_ok=True)
    path = folder / "step1_supervised_finetuning" / "step1.sh"
    path.write_text(
        '#!/bin/bash\nOUTPUT=$1\nZERO_STAGE=$2\nif [ "$OUTPUT" == "" ]; then\n    OUTPUT=./output\nfi\n'
        'if [ "$ZERO_STAGE" == "" ]; then\n    ZERO_STAGE=2\nfi\nmkdir -p $OUTPUT\n' + "\n".join(more) + "\n"
        "deepspeed main.py --model_name_or_path m --zero_stage $ZERO_STAGE --output_dir $OUTPUT &> $OUTPUT/x.log\n"
    )
    return path


def test_a_scripts_arguments_count(tmp_path):
    path = script_of_theirs(tmp_path)
    given = translate(f"bash {path} /data/run1 3")
    assert given.theirs.title == "step 1, supervised fine-tuning", "by the folder of its script"
    assert given.arguments[2:6] == ["--zero_stage", "3", "--output_dir", "/data/run1"]
    for text in (f"bash {path}", f"cd {path.parent}; {path.read_text()}"):
        assert translate(text).arguments[2:6] == ["--zero_stage", "2", "--output_dir", "./output"]


def test_flags_that_a_script_does_not_hand_on_are_said(tmp_path):
    path = script_of_theirs(tmp_path)
    said = "--dtype: the script does not hand on what it is given; write it there"
    assert said in translate(f"bash {path} out 2 --dtype bf16").lines
    path.write_text(path.read_text().replace("--output_dir $OUTPUT", '--output_dir $OUTPUT "${@:3}"'))
    assert "bf16" in translate(f"bash {path} out 2 --dtype bf16").arguments
    path.write_text("deepspeed main.py --seed 1 $@\n")
    made = translate(f"bash {path} --dtype bf16")
    assert "bf16" in made.arguments and said not in made.lines


def test_a_project_is_known_by_the_folder_of_its_script(tmp_path):
    (tmp_path / "alpaca_rlhf").mkdir()
    path = script_of_theirs(tmp_path / "alpaca_rlhf")
    assert translate(f"bash {path}").predecessor.name == "alpaca-rlhf"
    assert translate(f"bash {path}", "DeepSpeed-Chat").predecessor.name == "DeepSpeed-Chat"


@pytest.mark.parametrize(
    "unknown",
    [
        "if [ -f big.json ]; then LR=1e-3; fi",
        "[ -f big.json ] && LR=1e-3",
        "nvidia-smi || LR=1e-3",
        "if nvidia-smi > x; then LR=1e-3; else echo no; fi",
        "for LR in 1 2; do echo $LR; done",
        "set -- --lr 3; while [ -f a ]; do case $1 in --lr) LR=$2; shift;; esac; shift; done",
        "f() { case $1 in a) LR=1;; esac; }; f a",
        "while [ $LR != 3 ]; do if [ -f a ]; then LR=3; else break; fi; done",
        "while true; do LR=3; done",
        "until [ -f a ]; do LR=3; done",
        "f() { LR=1e-3; }\nf",
        "read LR",
        "if [ -f a ]; then IFS=, read -r A LR; fi",
        "((LR+=3))",
        "((++LR)) || true",
        "let LR=LR+3",
        "echo $((LR++))",
        "X=$((LR=3))",
        "for ((LR=0; LR<3; LR++)); do echo; done",
        "if [ -f a ]; then ((LR++)); fi",
        "printf -v LR %s 3",
        "mapfile -t LR < a",
        "getopts a: LR",
        "eval '((LR++))'",
        "[ -f a ] && eval LR=3",
        'eval "$(echo LR=3)"',
        "declare -i LR=LR+3",
        "typeset -i LR; LR+=3",
        "declare -u LR=a",
        "case $(hostname) in a) LR=1;; esac",
        "case abc in @(abc|b)) LR=1;; *) LR=2;; esac",
        "[[ abc == @(abc|b) ]] && LR=1",
        "[[ abc != *(x) ]] && LR=1",
        "[ b \\> a ] && LR=1",
        "LR=(1 2); unset LR[1]",
    ],
)
def test_what_can_not_be_known_is_not_taken(unknown):
    command = read_command(f"LR=1e-5\n{unknown}\ndeepspeed x/main.py --lr $LR")
    assert command.arguments == ["--lr", "$LR"]
    assert any(note.startswith("$LR stays as it is, for the shell to fill in; ") for note in command.notes)


def test_a_command_behind_a_condition_that_is_not_known_is_said():
    command = read_command("if [ -f a ]; then LR=1e-3; deepspeed x/main.py --lr $LR; fi")
    assert command.arguments == ["--lr", "1e-3"]
    assert "taken as if it were reached: '[ -f a ]' is not known here" in command.notes
    assert read_command("source x.sh && cd a && deepspeed x/main.py || exit 1").script == "a/x/main.py"
    with pytest.raises(UserError, match=r"ends at 'exit 1' before it starts .* give the script's arguments"):
        read_command("if [ $# -lt 1 ]; then echo usage; exit 1; fi; deepspeed x/main.py")


def test_folders_are_left_again():
    for text, folder in [
        ("pushd a; cd ../b; popd; pushd c", "c"),
        ("cd a; cd b; cd -; cd -", "a/b"),
        ("(pushd a); popd; cd -P b", "b"),
    ]:
        assert read_command(f"{text}; deepspeed x/main.py").script == f"{folder}/x/main.py"
    assert (
        "cd c is left out: paths are taken from where this command is started"
        in read_command("cd c; deepspeed x/main.py").notes
    )
    assert "'{a,b}'" in translate(f"deepspeed {STEP1} --output_dir '{{a,b}}'").text()


def test_a_document_of_windows_ends():
    text = "cat > x <<EOF\n{}\nEOF\ndeepspeed x/main.py --a 1\n".replace("\n", "\r\n")
    assert read_command(text).arguments == ["--a", "1"]


def test_a_tilde_in_quotes_is_said():
    for text in (
        'D="~/o"; deepspeed x/main.py --a $D',
        "deepspeed x/main.py --a '~/o'",
        "deepspeed x/main.py --a=\\~/o",
    ):
        found = read_command(text)
        assert any("~/o" in note and "begins in the home folder here" in note for note in found.notes), text
    assert not read_command("D=~/o; deepspeed x/main.py --a $D ~/b 'a~/b'").notes


def test_a_text_that_a_shell_is_given_keeps_its_launcher():
    """Also where it ends with the program, which is no word of the shell's own."""
    assert read_command("bash -lc 'deepspeed --num_gpus 8 x/main.py'").launcher == ["--num_gpus", "8"]


def test_exports_are_carried_over():
    made = translate(
        "export CUDA_VISIBLE_DEVICES=4,5,6,7\n# export NCCL_IB_HCA=a\nexport HF_HOME='/x y'\nNOT_EXPORTED=1\n"
        f"export PATH=/x:$PATH\nTOKENIZERS_PARALLELISM=false deepspeed {STEP1} --seed 1"
    )
    entries = "CUDA_VISIBLE_DEVICES=4,5,6,7 HF_HOME='/x y' PATH=/x:$PATH TOKENIZERS_PARALLELISM=false "
    assert f"\n{entries}{' '.join(deepspeed_launcher())} " in made.text()
    left = read_command("[ -f a ] && export CUDA_VISIBLE_DEVICES=1\ndeepspeed x/main.py")
    assert left.environment == []
    assert any(note.startswith("CUDA_VISIBLE_DEVICES is not set") for note in left.notes)


@pytest.mark.parametrize(
    ("written", "word", "printed"),
    [
        ("$(date +%s)", "$(date +%s)", '"$(date +%s)"'),
        ("out-`date +%s`", "out-$(date +%s)", '"out-$(date +%s)"'),
        ('"$T"', "run-$(date +%Y-%m-%d)", '"run-$(date +%Y-%m-%d)"'),
        ("$(basename $M)", "$(basename a/b)", '"$(basename a/b)"'),
        ("${HERE%/*}", "${HERE%/*}", '"${HERE%/*}"'),
        ("$((N*2))", "$((N*2))", '"$((N*2))"'),
        ("${HOME}/x", "${HOME}/x", "${HOME}/x"),
    ],
)
def test_what_stays_for_the_shell_is_whole_and_named(monkeypatch, written, word, printed):
    monkeypatch.delenv("HERE", raising=False)
    text = f"M=a/b; T=run-$(date +%Y-%m-%d); deepspeed {STEP1} --output_dir {written}"
    command = read_command(text)
    assert command.arguments == ["--output_dir", word]
    assert any(word[word.index("$") :].startswith(note.split(" stays")[0]) for note in command.notes)
    assert f"--output_dir {printed}" in translate(text).text()
    if not word.startswith("${HOME"):
        with pytest.raises(UserError, match="is not set here"):
            filled(word)


@pytest.mark.parametrize(
    ("known", "written", "word"),
    [
        ("N=3", "$((N**2))", "$((3**2))"),
        ("N=008", "$((10#$N + 1))", "$((10#008 + 1))"),
        ("P=12", "$((P + RANDOM % 9))", "$((12 + RANDOM % 9))"),
        ("X=a", '$(echo "$(echo "$X")" "it\'s" ${X:-b})', '$(echo "$(echo "a")" "it\'s" a)'),
        ("set -- a b", "$(echo $1 | awk '{print $2}')", "$(echo a | awk '{print $2}')"),
    ],
)
def test_what_stays_for_the_shell_has_the_script_s_values(known, written, word):
    assert read_command(f"{known}; deepspeed x/main.py --a {written}").arguments == ["--a", word]


def test_a_variable_of_the_shell_s_keeps_its_name_before_a_known_value(monkeypatch):
    monkeypatch.setenv("THERE", "x")
    text = 'B=2; C=$THERE; C+=_3; THERE+=4; deepspeed x/main.py "$NOT_SET$B" $NOT_SET"a" "$C" $THERE $NOT_SET.$B'
    assert read_command(text).arguments == [
        "${NOT_SET}2", "${NOT_SET}a", "${THERE}_3", "${THERE}4", "$NOT_SET.2"]  # fmt: skip


def test_loops_without_an_end_are_left():
    text = f"A=1; {'while true; do ' * 4} A=2; {'done; ' * 4} deepspeed x/main.py $A"
    assert read_command(text).arguments == ["$A"]


@pytest.mark.parametrize("form", ["$A", "${A}", "${L[@]}", "$*"])
def test_a_value_with_a_variable_of_the_shell_s_is_several_words(form):
    text = f'A="--a $NOT_SET/x --b 2"; L=("$A"); set -- "$A"; deepspeed x/main.py {form}'
    assert read_command(text).arguments == ["--a", "$NOT_SET/x", "--b", "2"]
    assert read_command(text.replace(form, f'"{form}"')).arguments == ["--a $NOT_SET/x --b 2"]
    assert read_command('C="deepspeed x/main.py --a $NOT_SET"; $C').arguments == ["--a", "$NOT_SET"]


@pytest.mark.parametrize("unknown", ["if [ -f x ]; then shift; fi", "nvidia-smi && shift", "[ -f x ] && set -- 7 8 9"])
def test_arguments_that_only_a_run_can_decide_are_not_taken(unknown):
    found = read_command(f'set -- 1 2\n{unknown}\ndeepspeed x/main.py $1 "$@" $#')
    assert found.arguments == ["$1", "$@", "$#"]
    assert any(note.startswith("$1 stays as it is") for note in found.notes)
    for known in ("f() { shift; }; f", "if [ -f x ]; then set -x; fi"):
        assert read_command(f"set -- 1 2\n{known}\ndeepspeed x/main.py $1 $#").arguments == ["1", "2"]


def test_what_is_quoted_is_one_word_of_an_array():
    text = 'G=("$NOT_SET/a" b); G+=(c); deepspeed x/main.py ${#G[@]} ${G[1]} "${G[@]}"'
    assert read_command(text).arguments == ["3", "b", "$NOT_SET/a", "b", "c"]


def test_a_default_gives_way_to_the_environment_here(monkeypatch):
    text = "deepspeed x/main.py --port ${PORT_OF_TEST:-29500}"
    monkeypatch.delenv("PORT_OF_TEST", raising=False)
    assert read_command(text).arguments == ["--port", "29500"]
    monkeypatch.setenv("PORT_OF_TEST", "1")
    assert read_command(text).arguments == ["--port", "$PORT_OF_TEST"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("X=a; deepspeed x/main.py --a ${X^^}", r"\$\{X\^\^\} is not read here: write its value"),
        ("X=a; deepspeed x/main.py --a ${X%@(a|b)}", r"\$\{X%@\(a\|b\)\} is not read here: write its value"),
        ("G=(${NOT_SET//,/ }); deepspeed x/main.py --a ${#G[@]}", r"\$\{#G\[@\]\} is not read here"),
        ("G=(a $(ls) b); deepspeed x/main.py --a ${G[2]}", r"\$\{G\[2\]\} is not read here"),
        ("set -- $(ls); deepspeed x/main.py --a $#", r"\$# is not read here"),
        ("set -- a; deepspeed x/main.py ${@:+b}", r"\$\{@:\+b\} is not read here"),
        ("X=a; Y=X; deepspeed x/main.py --a ${!Y}", r"\$\{!Y\} is not read here"),
        ("set -- a b; deepspeed x/main.py ${@:0}", r"\$\{@:0\} is not read here"),
        ("A=(ab cb); deepspeed x/main.py ${A[@]%b}", r"\$\{A\[@\]%b\} is not read here"),
        ("A=(ab cb); deepspeed x/main.py ${A[1]:-c}", r"\$\{A\[1\]:-c\} is not read here"),
        ("declare -A M=([a]=1); deepspeed x/main.py --a ${M[a]}", r"\$\{M\[a\]\} is not read here"),
        ("declare -A M=([a]=1); a=0; deepspeed x/main.py --a ${M[a]}", r"\[a\]=1 is not read here: write its value"),
        ("A=([1]=a [0]=b); deepspeed x/main.py ${A[0]}", r"\[1\]=a is not read here: write its value"),
        ("X='a b'; deepspeed x/main.py --a $(echo $X)", r"\$\(echo \$X\) is not read here"),
        ("X=ab; deepspeed x/main.py --a $(echo ${X:1})", r"\$\(echo \$\{X:1\}\) is not read here"),
        ("set -e; false; deepspeed x/main.py", "ends at 'false' before it starts"),
        ("set -e; true && false; deepspeed x/main.py", "ends at 'false' before it starts"),
        ("set -e; false || [ a = b ]; deepspeed x/main.py", r"ends at '\[ a = b \]' before it starts"),
        ("set -o errexit; [ a = b ]; deepspeed x/main.py", r"ends at '\[ a = b \]' before it starts"),
        ("deepspeed x/main.py --a <(echo $1) --b 2", r"<\(echo \$1\) is not read here: write its value"),
        ("X='a b'; deepspeed x/main.py --a=<(echo $X)", r"<\(echo \$X\) is not read here: write its value"),
        ("case a in a) A=1 ;& b) A=2;; esac; deepspeed x/main.py", "case a: ;& is not read here: end each branch with"),
        ("case $1 in a) A=1;;& *) A=2;; esac; deepspeed x/main.py", r"case \$1: ;;& is not read here"),
        ("declare -n R=X; R=5; deepspeed x/main.py --a $X", "declare -n R=X: another name of a variable is not read"),
        ("deepspeed x/main.py {a..c}", r"\{a\.\.c\} is not read here: write its value"),
        ("X=a; deepspeed x/main.py --a=p-{$X,q}", r"\{a,q\} is not read here: write its value"),
        ("X=a; deepspeed x/main.py --a '$X'", "a dollar that is not the shell's"),
        ("if true; then deepspeed x/main.py", "elif or else or fi is missing before the end"),
        ("deepspeed x/main.py; fi", "'fi' stands there without a beginning"),
        ("deepspeed x/main.py $(date", "No closing bracket"),
    ],
)
def test_refused_in_one_line(text, said):
    with pytest.raises(UserError, match=said):
        read_command(text)


def test_a_file_of_assignments_lasts_and_none_is_read_for_ever(tmp_path):
    (tmp_path / "env.sh").write_text("LR=3\nsource env.sh\n")
    (tmp_path / "run.sh").write_text("source env.sh\ndeepspeed x/main.py --lr $LR\n")
    assert read_command(f"cd {tmp_path}; bash run.sh").arguments == ["--lr", "3"]
    (tmp_path / "run.sh").write_text("bash other.sh\n")
    (tmp_path / "other.sh").write_text("bash run.sh\n")
    with pytest.raises(UserError, match="starts itself"):
        read_command(f"cd {tmp_path}; bash run.sh")


def test_a_file_is_taken_as_a_script(tmp_path, monkeypatch):
    path = script_of_theirs(tmp_path)
    for argv in ([str(path), "/data/run1", "3"], ["bash", str(path), "/data/run1", "3"], [f"{path} /data/run1 3"]):
        assert translate(parse_flags(argv)[1]).arguments[2:6] == ["--zero_stage", "3", "--output_dir", "/data/run1"]
    bare = tmp_path / "step1_supervised_finetuning" / "run"
    os.rename(path, bare)
    assert translate(parse_flags([str(bare)])[1]).arguments[3] == "2"
