"""The table of the zoo: what is expected of each model under each layout, where it is not the numbers of one process."""

from tests.zoo.verdict import Row, refused

NO_ROLES = {"tp*": refused("tensor_parallel needs to know which layers to cut")}

TABLE: dict[str, Row] = {
    "gpt without roles": NO_ROLES,
}
