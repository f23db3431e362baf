//! Files that are not as they should be.

use super::tests::{gzip, parquet_texts, read, zstd};
use crate::data::source::Columns;
use std::fs;

/// Each error names the place, what is wrong there, and what to do.
#[test]
fn bad_files_are_named_with_the_place() {
    let half = |bytes: Vec<u8>| bytes[..bytes.len() / 2].to_vec();
    let random: Vec<u8> = (0..4000u32).map(|i| b'a' + (i * i % 251 % 26) as u8).collect();
    let mut broken = gzip(&random);
    let middle = broken.len() / 2;
    broken[middle..middle + 20].fill(0xff);
    let json = |text: &str| text.as_bytes().to_vec();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("a.txt", json(" \n"), "a.txt: the file is empty"),
        ("a.jsonl", json(""), "a.jsonl: the file is empty"),
        ("a.json", json("\n"), "a.json: the file is empty"),
        ("a.json", json("[]"), "a.json: the file is empty"),
        ("a.csv", json(""), "a.csv: the file is empty"),
        ("a.csv", json("text\n"), "a.csv: the file is empty"),
        ("a.csv.gz", json(""), "a.csv.gz: the file is empty"),
        ("a.parquet", parquet_texts(&["text"], &[]), "a.parquet: the file is empty"),
        ("a.txt", b"One.\n\xff\xfe".to_vec(), "a.txt:2: not UTF-8 text"),
        ("a.jsonl", b"{\"text\": \"\xff\"}".to_vec(), "a.jsonl:1: not UTF-8 text"),
        ("a.csv", b"text\nOne.\nTw\xff.\n".to_vec(), "a.csv:3: not UTF-8 text"),
        (
            "a.jsonl",
            json("{\"text\": \"a\"}\n{\"text\":"),
            "a.jsonl:2: not a JSON object: EOF while parsing a value, at column 8",
        ),
        (
            "a.jsonl",
            json("[1]"),
            "a.jsonl:1: not a JSON object: invalid type: sequence, expected a map",
        ),
        (
            "a.json",
            json("[{\"text\": \"a\"},\n{\"text\": a}]"),
            "a.json:2: not a JSON object: expected value, at column 10",
        ),
        (
            "a.json",
            json("[\n{\n\"text\": a}]"),
            "a.json:3: not a JSON object: expected value, at column 9",
        ),
        (
            "a.json",
            json("[{\"text\": \"a\"}\n{\"text\": \"b\"}]"),
            "a.json:2: not JSON: expected ',' of the next element, found '{'",
        ),
        (
            "a.json",
            json("[{\"text\": \"a\"},\n"),
            "a.json:2: not JSON: the file ends where '{' of an object",
        ),
        (
            "a.json",
            json("[{\"text\": \"a"),
            "a.json:1: not JSON: the file ends where the rest of a value",
        ),
        (
            "a.json",
            json("[{\"text\": \"a\"}] x"),
            "a.json:1: something follows the end of the list",
        ),
        (
            "a.json",
            json("[\"a\"]"),
            "a.json:1: the list holds other things than objects; expected such as {\"text\": ...}",
        ),
        (
            "a.json",
            json("text"),
            "a.json:1: not JSON: expected '[' of a list of objects, or '{' of an object, found 't'",
        ),
        (
            "a.json",
            json("{\"a\": [{}], \"b\": [{}]}"),
            "a.json: the object holds several lists (a, b), expected one",
        ),
        (
            "a.csv",
            json("prompt,completion\na,b\n\nc,d,e\n"),
            "a.csv:4: 3 fields, but the header has 2; put a field that holds",
        ),
        (
            "a.csv",
            json("prompt,completion\na,b\n\"c\",\"\"\"d\nof\"\" two\ne,f\n"),
            "a.csv:3: the quote that begins a field here is never closed",
        ),
        (
            "a.csv",
            json("text,id\na,1\n\nb,2\r\n\"c,3\nd,4\n"),
            "a.csv:5: the quote that begins a field here is never closed",
        ),
        ("a.csv", json("\"text\na\n"), "a.csv:1: the quote that begins a field here is never"),
        ("a.tsv", json("text\tid\na\t\"1"), "a.tsv:2: the quote that begins a field here is never"),
        ("a.csv", json("text,text\na,b\n"), "a.csv:1: the header names the column \"text\" twice"),
        ("a.txt.gz", half(gzip(&random)), "a.txt.gz:1: the gzip data are damaged or cut off"),
        ("a.txt.gz", broken, "a.txt.gz:1: the gzip data are damaged or cut off"),
        ("a.jsonl.zst", half(zstd(&random)), "a.jsonl.zst:1: the zstd data are damaged or cut off"),
        ("a.csv.gz", half(gzip(&random)), "a.csv.gz:1: the gzip data are damaged or cut off"),
        ("a.parquet.gz", half(gzip(&random)), "a.parquet.gz: the gzip data are damaged or cut off"),
        ("a.jsonl.gz", json("{}"), "a.jsonl.gz: the name says gzip, the first bytes do not"),
        (
            "a.parquet",
            half(parquet_texts(&["text"], &[&[Some("One.")]])),
            "a.parquet: not a whole Parquet file",
        ),
        ("a.parquet", json("text"), "a.parquet: not a whole Parquet file"),
    ];
    for (name, bytes, expected) in cases {
        let error = read(name, bytes).expect_err(expected);
        assert!(error.starts_with(expected), "expected {expected}\n     got {error}");
    }
}

#[test]
fn reading_ends_at_the_first_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    fs::write(&path, "{\"text\": \"a\"}\n{\n{\"text\": \"b\"}\n").unwrap();
    let source = super::FileSource::local(path, &Columns::default());
    let found: Vec<bool> = source.records().unwrap().map(|located| located.is_ok()).collect();
    assert_eq!(found, [true, false]);
}

/// Whatever a disk or a download does to a file: its records, or an error that names it.
#[test]
fn a_damaged_parquet_file_is_named_and_ends_nothing_else() {
    let prompts: Vec<String> = (0..40).map(|i| format!("What is {i} times {i}?")).collect();
    let rows: Vec<[Option<&str>; 2]> =
        prompts.iter().map(|prompt| [Some(prompt.as_str()), Some("See there.")]).collect();
    let rows: Vec<&[Option<&str>]> = rows.iter().map(|row| &row[..]).collect();
    let whole = parquet_texts(&["prompt", "completion"], &rows);
    assert_eq!(read("a.parquet", &whole).unwrap().len(), rows.len());
    let mut n_errors = 0;
    let mut check = |bytes: &[u8], what: &str| match read("a.parquet", bytes) {
        Ok(_) => {}
        Err(error) => {
            n_errors += 1;
            assert!(error.starts_with("a.parquet"), "{what}: {error}");
        }
    };
    for end in (0..whole.len()).step_by(7) {
        check(&whole[..end], &format!("cut off at {end}"));
    }
    for at in (0..whole.len()).step_by(3) {
        let mut bytes = whole.clone();
        bytes[at] ^= if at % 2 == 0 { 0x01 } else { 0x80 };
        check(&bytes, &format!("byte {at} flipped"));
    }
    println!("{n_errors} damages were noticed in {} bytes", whole.len());
    assert!(n_errors > whole.len() / 7);
}
