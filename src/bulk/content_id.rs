//! Ids for rows that have none of their own: out of what is in them. So a row keeps its id, and its link, wherever it
//! is moved to, and whoever is put in its place gets another one. A number would be given to the next one who has it.

use std::collections::HashMap;

use csv::ByteRecord;
use sha2::{Digest as _, Sha256};

use super::hashes::Hashes;
use crate::job::json::Node;

/// Makes them, row by row: rows that are the same to the last cell are told apart by which of them comes first.
#[derive(Debug, Default)]
pub(super) struct ContentIds {
    /// Names of columns, each with its place, in the order of the names: columns may change places.
    columns: Vec<(String, usize)>,
    seen: Hashes,
    /// How often there were those that came more than once.
    again: HashMap<u64, u64>,
}

impl ContentIds {
    /// Of the rows of a table with that header.
    pub(super) fn of_table(names: &[String]) -> Self {
        let places = names.iter().enumerate();
        let mut columns: Vec<_> = places.map(|(at, name)| (name.trim().to_owned(), at)).collect();
        columns.sort();
        // Of columns that have one name, each gets one of its own: which one it is of them.
        for at in (1..columns.len()).rev() {
            let same =
                columns[..at].iter().rev().take_while(|(name, _)| *name == columns[at].0).count();
            if same > 0 {
                columns[at].0 = format!("{}\0{same}", columns[at].0);
            }
        }
        Self { columns, ..Self::default() }
    }

    /// The id of a row, from its cells that are not empty: 16 hexadecimal digits, and which one it is of several that
    /// are the same.
    pub(super) fn of_cells(&mut self, cells: &ByteRecord) -> String {
        let mut hash = Sha256::new();
        for (name, at) in &self.columns {
            if let Some(cell) = cells.get(*at).filter(|cell| !cell.is_empty()) {
                add(&mut hash, name.as_bytes());
                add(&mut hash, cell);
            }
        }
        self.id(hash)
    }

    /// The same of an object, whatever the order of its keys.
    pub(super) fn of_members(&mut self, members: &[(String, Node)]) -> String {
        let mut text = Vec::new();
        Node::Object(members.to_vec()).write_canonical_to(&mut text);
        self.id(Sha256::new().chain_update(&text))
    }

    fn id(&mut self, hash: Sha256) -> String {
        let first = hash.finalize().into_iter().take(8);
        let digest = first.fold(0, |digest, byte| digest << 8 | u64::from(byte));
        if self.seen.insert(digest) {
            return format!("{digest:016x}");
        }
        let times = self.again.entry(digest).or_insert(1);
        *times += 1;
        format!("{digest:016x}-{times}")
    }
}

/// With its length, so that two texts cannot shift into each other.
fn add(hash: &mut Sha256, text: &[u8]) {
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(names: &[&str], rows: &[&[&str]]) -> Vec<String> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut ids = ContentIds::of_table(&names);
        rows.iter().map(|row| ids.of_cells(&ByteRecord::from(row.to_vec()))).collect()
    }

    #[test]
    fn a_row_keeps_its_id_wherever_it_is_and_however_the_columns_lie() {
        let first = ids(&["Name", "City"], &[&["Ada", "Rome"], &["Bob", ""]]);
        assert_ne!(first[0], first[1]);
        let moved = ids(
            &["City", " Name ", "Notes"],
            &[&["", "Eve", ""], &["", "Bob", ""], &["Rome", "Ada", ""]],
        );
        assert_eq!(moved[1..], [first[1].clone(), first[0].clone()]);
        assert!(!first.contains(&moved[0]));
        // Nor is a cell another column's.
        assert_ne!(ids(&["Name", "City"], &[&["", "Bob"]])[0], first[1]);
        assert_ne!(ids(&["Name", "City"], &[&["AdaRome", ""]])[0], first[0]);
        let unnamed = ids(&["a", "", ""], &[&["x", "Ada", ""], &["x", "", "Ada"]]);
        assert!(!unnamed[1].ends_with("-2"), "{unnamed:?}");
    }

    #[test]
    fn an_id_is_the_same_on_every_machine() {
        // By Python: hashlib.sha256(pack("<Q", 1) + b"a" + pack("<Q", 1) + b"b").hexdigest()[:16]
        assert_eq!(ids(&["a"], &[&["b"]]), ["cf6ab613e3942391"]);
        let mut of_objects = ContentIds::default();
        let object = [("a".to_owned(), Node::Bool(true))];
        // hashlib.sha256(b'{"a":true}').hexdigest()[:16]
        assert_eq!(of_objects.of_members(&object), "5daa0644c4a1c43e");
    }

    #[test]
    fn rows_that_are_the_same_are_counted() {
        let all = ids(&["a"], &[&["x"], &["y"], &["x"], &["x"]]);
        let x = &all[0];
        assert_eq!(all[2..], [format!("{x}-2"), format!("{x}-3")]);
        assert_ne!(*x, all[1]);
    }

    #[test]
    fn an_object_is_the_same_whatever_the_order_of_its_keys() {
        let members = |text: &str| match Node::parse(text).unwrap() {
            Node::Object(members) => members,
            Node::Null | Node::Bool(_) | Node::Number(_) | Node::String(_) | Node::Array(_) => {
                panic!("{text}")
            }
        };
        let mut ids = ContentIds::default();
        let first = ids.of_members(&members(r#"{"a":1,"b":{"c":2,"d":3}}"#));
        let second = ids.of_members(&members(r#"{"b":{"d":3,"c":2},"a":1}"#));
        assert_eq!(second, format!("{first}-2"));
        assert_ne!(ids.of_members(&members(r#"{"a":1}"#)), first);
    }
}
