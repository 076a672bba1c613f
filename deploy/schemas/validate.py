"""Validates rendered manifests, each object against a schema that knows all of its fields.

    validate.py VERSION,VERSION... FILE...

Kubernetes' own kinds are checked against the schemas of every VERSION that kubernetes-validate ships;
the `spec` of other groups' kinds against KIND_VERSION in GROUP.yaml beside this file. A kind without a schema is
an error, and so is a field that its schema does not name. Those files are kept by hand: they know the
fields that are used here, as the definitions that they name have them, and no others.
"""

import functools
import sys
from collections import Counter
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml

HERE = Path(__file__).parent
CLUSTER_SCOPED = {"Namespace"}
NAME = "^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
METADATA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": NAME},
        "namespace": {"type": "string", "pattern": NAME},
        "labels": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice: YAML takes the last one without a word."""


def mapping(loader, node):
    keys = Counter(key.value for key, _ in node.value)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {', '.join(twice)} is given twice")
    return loader.construct_mapping(node, deep=True)


UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)


@functools.cache
def group_schemas(group):
    path = HERE / f"{group}.yaml"
    return yaml.load(path.read_text(), UniqueKeys) if path.is_file() else {}


def custom_schema(item):
    group, _, version = item["apiVersion"].rpartition("/")
    schemas = group_schemas(group)
    spec = schemas.get(f"{item['kind']}_{version}")
    if spec is None:
        return None
    return {
        "$defs": schemas.get("$defs", {}),
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {},
            "kind": {},
            "metadata": METADATA,
            "spec": {"type": "object", "additionalProperties": False, **spec},
        },
    }


def problems(item, versions):
    if item["kind"] not in CLUSTER_SCOPED and not item["metadata"].get("namespace"):
        yield "it has no namespace: it would be made in whatever kubectl is set to"
    if schema := custom_schema(item):
        check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(["regex"]))
        for error in check.iter_errors(item):
            yield f"{error.json_path[2:] or 'it'}: {error.message}"
        return
    for version in versions:
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            yield f"no schema for {item['apiVersion']} {item['kind']}: write one in deploy/schemas"
            return
        except kubernetes_validate.ValidationError as error:
            where = ".".join(map(str, error.absolute_path)) or "it"
            yield f"{where}: {error.message} (Kubernetes {version})"
            return


def main(versions, files):
    known = {kubernetes_validate.utils.major_minor(version) for version in kubernetes_validate.utils.all_versions()}
    if missing := set(versions) - known:
        sys.exit(f"kubernetes-validate has no schemas of {', '.join(missing)}")
    # What is wrong, and where: one mistake is in many renders, and is said once.
    wrong, objects, kinds = {}, 0, set()
    for file in map(Path, files):
        items = [item for item in yaml.load_all(file.read_text(), UniqueKeys) if item is not None]
        objects += len(items)
        kinds |= {item["kind"] for item in items}
        found = [] if items else ["nothing is in it"]
        names = Counter((i["apiVersion"], i["kind"], i["metadata"].get("namespace"), i["metadata"]["name"]) for i in items)
        found += [f"{name[1]} {name[3]}: it is in it twice" for name, count in names.items() if count > 1]
        found += [f"{item['kind']} {item['metadata']['name']}: {what}" for item in items for what in problems(item, versions)]
        for what in found:
            wrong.setdefault(what, []).append(file.name)
    for what, where in wrong.items():
        print(f"{what}\n    in {where[-1]}" + (f" and {len(where) - 1} more" if len(where) > 1 else ""), file=sys.stderr)
    if wrong:
        sys.exit(1)
    print(f"{objects} objects of {len(kinds)} kinds in {len(files)} renders, Kubernetes {' and '.join(versions)}")


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2:])
