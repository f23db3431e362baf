use crate::data::source::{Columns, Content, DataSpec, Record};
use ::parquet::data_type::{ByteArray, ByteArrayType};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;
use serde_json::json;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

/// The records of one file with their places, or the first error as a user sees it; `DIR` stands
/// for the file's folder.
fn read_with(name: &str, bytes: &[u8], columns: &Columns) -> Result<Vec<(String, Record)>, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    records(&DataSpec { columns: columns.clone(), ..DataSpec::files(vec![path]) }, dir.path())
}

pub(super) fn read(name: &str, bytes: impl AsRef<[u8]>) -> Result<Vec<(String, Record)>, String> {
    read_with(name, bytes.as_ref(), &Columns::default())
}

fn records(spec: &DataSpec, dir: &Path) -> Result<Vec<(String, Record)>, String> {
    let dir = format!("{}/", dir.display());
    let short = |text: String| text.replace(&dir, "");
    let mut records = Vec::new();
    for source in spec.open().map_err(|error| short(error.to_string()))?.train {
        let located = source.records().map_err(|error| short(error.to_string()))?;
        for record in located {
            let (place, record) = record.map_err(|error| short(error.to_string()))?;
            records.push((short(place.to_string()), record));
        }
    }
    Ok(records)
}

fn text(text: &str) -> Record {
    Record::Text(text.into())
}

fn pair(prompt: &str, completion: &str) -> Record {
    Record::Completion { prompt: prompt.into(), completion: completion.into() }
}

fn at(place: &str, record: Record) -> (String, Record) {
    (place.into(), record)
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

pub(super) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

/// A Parquet file of text columns in two row groups; `None` is a missing value.
pub(super) fn parquet_texts(names: &[&str], rows: &[&[Option<&str>]]) -> Vec<u8> {
    let fields: String =
        names.iter().map(|name| format!("optional byte_array {name} (UTF8); ")).collect();
    let schema = Arc::new(parse_message_type(&format!("message schema {{ {fields} }}")).unwrap());
    let mut bytes = Vec::new();
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
    let (first, second) = rows.split_at(rows.len() / 2);
    for rows in [first, second] {
        let mut group = writer.next_row_group().unwrap();
        for column in 0..names.len() {
            let cells: Vec<Option<&str>> = rows.iter().map(|row| row[column]).collect();
            let values: Vec<ByteArray> =
                cells.iter().flatten().map(|text| ByteArray::from(*text)).collect();
            let levels: Vec<i16> = cells.iter().map(|cell| i16::from(cell.is_some())).collect();
            let mut writer = group.next_column().unwrap().unwrap();
            writer.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            writer.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}

/// A Parquet file with one column `messages`, a list of structs with `role`, `content` and an
/// always empty `name`.
fn parquet_chats(chats: &[&[(&str, &str)]]) -> Vec<u8> {
    let schema = "message schema { optional group messages (LIST) { repeated group list {
        optional group element { optional byte_array content (UTF8);
        optional byte_array name (UTF8); optional byte_array role (UTF8); } } } }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut bytes = Vec::new();
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut repeats = Vec::new();
    for chat in chats {
        repeats.extend((0..chat.len()).map(|i| i16::from(i > 0)));
    }
    let messages: Vec<(&str, &str)> = chats.iter().flat_map(|chat| chat.iter().copied()).collect();
    let contents = messages.iter().map(|(_, content)| ByteArray::from(*content)).collect();
    let roles = messages.iter().map(|(role, _)| ByteArray::from(*role)).collect();
    // Every level above the value is there: 4 is the value itself, 3 is an element without it.
    for (values, level) in [(contents, 4), (Vec::new(), 3), (roles, 4)] {
        let levels = vec![level; messages.len()];
        let mut writer = group.next_column().unwrap().unwrap();
        let column = writer.typed::<ByteArrayType>();
        column.write_batch(&values, Some(&levels), Some(&repeats)).unwrap();
        writer.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

#[test]
fn paragraphs_of_a_text_file_stand_at_their_first_line() {
    let found = read("a.txt", "\u{feff}One.\r\nTwo.\r\n \r\n\r\nThree.").unwrap();
    assert_eq!(found, [at("a.txt:1", text("One.\nTwo.")), at("a.txt:5", text("Three."))]);
    // Also without a known ending.
    assert_eq!(read("notes", "One.").unwrap(), [at("notes:1", text("One."))]);
}

#[test]
fn every_kind_of_file_gives_the_same_records_plain_and_packed() {
    let rows: &[&[Option<&str>]] =
        &[&[Some("Why?"), Some("1"), Some("So.")], &[Some("Là?\n"), None, Some("\"Oui\", oui")]];
    let files: [(&str, Vec<u8>, [&str; 2]); 6] = [
        (
            "a.jsonl",
            b"\n{\"prompt\": \"Why?\", \"id\": 1, \"completion\": \"So.\"}\n{\"prompt\": \"L\\u00e0?\\n\", \"completion\": \"\\\"Oui\\\", oui\"}\n".to_vec(),
            [":2", ":3"],
        ),
        (
            "a.json",
            b"[\n  {\"prompt\": \"Why?\",\n   \"completion\": \"So.\"},\n  {\"prompt\": \"L\\u00e0?\\n\", \"completion\": \"\\\"Oui\\\", oui\", \"more\": [1, {\"x\": \"]}\"}]}\n]\n".to_vec(),
            [":2", ":4"],
        ),
        ("a.csv", "prompt,id,completion\nWhy?,1,So.\n\"Là?\n\",,\"\"\"Oui\"\", oui\"\n".into(), [":2", ":3"]),
        ("b.csv", "prompt;id;completion\nWhy?;1;So.\n\"Là?\n\";;\"\"\"Oui\"\", oui\"\n".into(), [":2", ":3"]),
        ("a.tsv", "prompt\tid\tcompletion\nWhy?\t1\tSo.\n\"Là?\n\"\t\t\"\"\"Oui\"\", oui\"\n".into(), [":2", ":3"]),
        ("a.parquet", parquet_texts(&["prompt", "id", "completion"], rows), [", row 1", ", row 2"]),
    ];
    for (name, bytes, places) in files {
        for (ending, bytes) in [("", bytes.clone()), (".gz", gzip(&bytes)), (".zst", zstd(&bytes))]
        {
            let name = format!("{name}{ending}");
            let expected = [
                at(&format!("{name}{}", places[0]), pair("Why?", "So.")),
                at(&format!("{name}{}", places[1]), pair("Là?\n", "\"Oui\", oui")),
            ];
            assert_eq!(read(&name, bytes).unwrap(), expected, "{name}");
        }
    }
}

#[test]
fn packed_files_are_seen_by_their_first_bytes_too() {
    assert_eq!(read("a.txt", gzip(b"One.")).unwrap(), [at("a.txt:1", text("One."))]);
    let two_members = [gzip(b"One.\n\n"), gzip(b"Two.")].concat();
    assert_eq!(read("a.txt.gz", two_members).unwrap().len(), 2);
    let parquet = parquet_texts(&["text"], &[&[Some("One.")]]);
    assert_eq!(read("download", parquet).unwrap(), [at("download, row 1", text("One."))]);
}

#[test]
fn json_is_a_list_an_object_with_a_list_or_objects_one_after_the_other() {
    let expected = |first: usize, second: usize| {
        [
            at(&format!("a.json:{first}"), text("One.")),
            at(&format!("a.json:{second}"), text("Two.")),
        ]
    };
    for (json, first, second) in [
        ("[{\"text\": \"One.\"},\n{\"text\": \"Two.\"}]", 1, 2),
        (
            "{\"version\": [1, 2],\n\"data\": [{\"text\": \"One.\"}, {\"text\": \"Two.\"}], \"x\": {}}",
            2,
            2,
        ),
        ("{\"text\": \"One.\"}\n{\"text\": \"Two.\"}\n", 1, 2),
        ("{\n\"text\": \"One.\"\n}\n{\"text\": \"Two.\"}", 1, 4),
    ] {
        assert_eq!(read("a.json", json).unwrap(), expected(first, second), "{json}");
    }
    // The list in it is a conversation, not the records.
    let one = r#"{"messages": [{"role": "assistant", "content": "Hi"}]}"#;
    assert_eq!(read("a.json", one).unwrap().len(), 1);
}

#[test]
fn parquet_lists_of_messages_are_conversations() {
    let bytes = parquet_chats(&[&[("user", "Hi"), ("assistant", "Hello")], &[("assistant", "So")]]);
    let chat = |messages: serde_json::Value| Record::Chat {
        messages: messages.as_array().unwrap().clone(),
        tools: Vec::new(),
    };
    let first =
        json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]);
    let second = json!([{"role": "assistant", "content": "So"}]);
    let expected = [at("a.parquet, row 1", chat(first)), at("a.parquet, row 2", chat(second))];
    assert_eq!(read("a.parquet", bytes).unwrap(), expected);
}

#[test]
fn a_missing_text_is_an_empty_one() {
    let bytes = parquet_texts(&["text"], &[&[None], &[Some("One.")]]);
    let found = read("a.parquet", bytes).unwrap();
    assert_eq!(found, [at("a.parquet, row 1", text("")), at("a.parquet, row 2", text("One."))]);
}

#[test]
fn columns_that_no_record_needs_are_not_read() {
    // Bytes that are no text would be an error.
    let schema = "message schema { required byte_array image; required byte_array text (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for value in [ByteArray::from(vec![0xff, 0xd8]), ByteArray::from("One.")] {
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&[value], None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    assert_eq!(read("a.parquet", &bytes).unwrap(), [at("a.parquet, row 1", text("One."))]);
    let image = Columns { text: Some("image".into()), ..Columns::default() };
    let error = read_with("a.parquet", &bytes, &image).unwrap_err();
    assert_eq!(error, "a.parquet, row 1: bytes that are not UTF-8 text");
}

#[test]
fn wrong_columns_name_those_that_there_are() {
    let there = "the columns are \"a\", \"b\"";
    let rows: &[&[Option<&str>]] = &[&[Some("x"), Some("y")]];
    for (name, bytes, place) in [
        ("t.csv", b"a,b\nx,y\n".to_vec(), "t.csv:1: "),
        ("t.jsonl", b"{\"a\": \"x\", \"b\": \"y\"}".to_vec(), "t.jsonl:1: "),
        ("t.json", b"[{\"a\": \"x\", \"b\": \"y\"}]".to_vec(), "t.json:1: "),
        ("t.parquet", parquet_texts(&["a", "b"], rows), "t.parquet: "),
    ] {
        let error = read(name, &bytes).unwrap_err();
        assert!(error.starts_with(&format!("{place}no column says what to learn")), "{error}");
        assert!(error.contains(there) && error.contains("--text-column"), "{error}");
        let columns = Columns { text: Some("c".into()), ..Columns::default() };
        let error = read_with(name, &bytes, &columns).unwrap_err();
        let expected = "there is no column \"c\", which --text-column asks for";
        assert!(error.contains(expected) && error.contains(there), "{error}");
        let columns = Columns {
            prompt: Some("b".into()),
            completion: Some("a".into()),
            ..Columns::default()
        };
        let found = read_with(name, &bytes, &columns).unwrap();
        assert_eq!(found[0].1, pair("y", "x"));
    }
}

#[test]
fn rows_of_a_table_stand_at_their_first_line() {
    for end in ["\n", "\r\n"] {
        let lines = ["\u{feff}text,id", "", "a,1", "\"b", "", "c\",2", "", "d,3"].join(end);
        let found = read("a.csv", &lines).unwrap();
        let places: Vec<&str> = found.iter().map(|(place, _)| place.as_str()).collect();
        assert_eq!(places, ["a.csv:3", "a.csv:4", "a.csv:8"], "{end:?}");
        assert_eq!(found[1].1, text(&format!("b{end}{end}c")));
    }
}

/// Within a field they are as any other sign, and a doubled one at the end of quotes closes nothing.
#[test]
fn quotes_that_open_nothing_are_text() {
    let csv = "text,id\n5\" nails,1\n\"an \"\"end\"\"\",2\n\"so\"\" \",3\nlast \"";
    let found = read("a.csv", format!("{csv},4")).unwrap();
    let texts = ["5\" nails", "an \"end\"", "so\" ", "last \""];
    assert_eq!(found.into_iter().map(|(_, record)| record).collect::<Vec<_>>(), texts.map(text));
}

#[test]
fn a_table_carries_messages_as_json() {
    let csv = "messages\n\"[{\"\"role\"\": \"\"assistant\"\", \"\"content\"\": \"\"Hi\"\"}]\"\n";
    let Record::Chat { messages, .. } = &read("a.csv", csv).unwrap()[0].1 else { panic!() };
    assert_eq!(messages, json!([{"role": "assistant", "content": "Hi"}]).as_array().unwrap());
}

#[test]
fn the_fingerprint_follows_content_and_columns() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str, bytes: &str, columns: &Columns| {
        let path = dir.path().join(name);
        File::create(&path).unwrap().write_all(bytes.as_bytes()).unwrap();
        super::FileSource::local(path, columns).fingerprint().unwrap().unwrap()
    };
    let usual = Columns::default();
    let first = of("a.jsonl", "{\"text\": \"a\"}", &usual);
    assert_eq!(first, of("b.jsonl", "{\"text\": \"a\"}", &usual));
    assert_ne!(first, of("a.jsonl", "{\"text\": \"b\"}", &usual));
    assert_ne!(first, of("a.txt", "{\"text\": \"a\"}", &usual));
    let other = Columns { preferences: true, ..Columns::default() };
    assert_ne!(first, of("a.jsonl", "{\"text\": \"a\"}", &other));
}

#[test]
fn preferences_come_from_a_table_too() {
    let csv = "question,chosen,rejected\nWhy?,So.,No.\n";
    let content = |text: &str| Content::Text(text.into());
    let expected = Record::Preference {
        prompt: content("Why?"),
        chosen: content("So."),
        rejected: content("No."),
    };
    assert_eq!(read("a.csv", csv).unwrap(), [at("a.csv:2", expected)]);
}

#[test]
fn folders_below_that_have_data_are_named() {
    let dir = tempfile::tempdir().unwrap();
    for (folder, file) in [("more", "a.txt"), ("_hidden", "b.txt"), ("code", "c.py")] {
        fs::create_dir(dir.path().join(folder)).unwrap();
        fs::write(dir.path().join(folder).join(file), "a").unwrap();
    }
    assert_eq!(super::folders_with_data(dir.path()).unwrap(), ["more"]);
}
