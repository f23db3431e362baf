//! Two contracts side by side.

use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    MethodDescriptorProto,
};
use std::collections::BTreeMap;

/// Everything that a program of the `old` contract can meet in the `new` one and does not understand:
/// empty if they get along. What is only in `new` breaks nothing, since unknown fields are passed over.
pub fn breaks(old: &FileDescriptorSet, new: &FileDescriptorSet) -> Vec<String> {
    let (old, new) = (Contract::of(old), Contract::of(new));
    let mut found = Vec::new();
    for (name, old) in &old.messages {
        match new.messages.get(name) {
            Some(new) => message(name, old, new, &mut found),
            None => found.push(format!("message {name} is gone")),
        }
    }
    for (name, old) in &old.enums {
        match new.enums.get(name) {
            Some(new) => values(name, old, new, &mut found),
            None => found.push(format!("enum {name} is gone")),
        }
    }
    for (name, old) in &old.calls {
        match new.calls.get(name) {
            Some(new) if call(old) == call(new) => {}
            Some(new) => found.push(format!("{name} was {}, and is {}", call(old), call(new))),
            None => found.push(format!("{name} is gone")),
        }
    }
    found
}

/// What a contract has, by full names.
#[derive(Default)]
struct Contract<'a> {
    messages: BTreeMap<String, &'a DescriptorProto>,
    enums: BTreeMap<String, &'a EnumDescriptorProto>,
    calls: BTreeMap<String, &'a MethodDescriptorProto>,
}

impl<'a> Contract<'a> {
    fn of(files: &'a FileDescriptorSet) -> Contract<'a> {
        let mut contract = Contract::default();
        for file in &files.file {
            let package = file.package();
            file.message_type.iter().for_each(|each| contract.add(package, each));
            for each in &file.enum_type {
                contract.enums.insert(format!("{package}.{}", each.name()), each);
            }
            for service in &file.service {
                for each in &service.method {
                    let name = format!("{package}.{}/{}", service.name(), each.name());
                    contract.calls.insert(name, each);
                }
            }
        }
        contract
    }

    fn add(&mut self, scope: &str, message: &'a DescriptorProto) {
        let name = format!("{scope}.{}", message.name());
        message.nested_type.iter().for_each(|each| self.add(&name, each));
        for each in &message.enum_type {
            self.enums.insert(format!("{name}.{}", each.name()), each);
        }
        self.messages.insert(name, message);
    }
}

fn message(name: &str, old: &DescriptorProto, new: &DescriptorProto, found: &mut Vec<String>) {
    for field in &old.field {
        let number = field.number();
        let (was, is) = (
            describe(old, field),
            new.field.iter().find(|other| other.number() == number).map(|f| describe(new, f)),
        );
        match is {
            Some(is) if is == was => {}
            Some(is) => found.push(format!("{name}: field {number} was `{was}`, and is `{is}`")),
            None => found.push(format!("{name}: field {number}, `{was}`, is gone")),
        }
    }
    // Somebody may still send what was there before the old contract.
    for field in &new.field {
        let number = field.number();
        let is_reserved = |range: &prost_types::descriptor_proto::ReservedRange| {
            (range.start()..range.end()).contains(&number)
        };
        if old.reserved_range.iter().any(is_reserved) {
            let is = describe(new, field);
            found.push(format!("{name}: number {number} was retired, and is used for `{is}`"));
        }
    }
}

/// All of a field that either side sees, on the wire or in what it means: its name too, since JSON and
/// people go by it.
fn describe(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let label = match (field.label(), field.proto3_optional()) {
        (Label::Repeated, _) => "repeated ",
        (Label::Required, _) => "required ",
        (Label::Optional, true) => "optional ",
        (Label::Optional, false) => "",
    };
    let kind = match field.r#type() {
        Type::Message | Type::Enum | Type::Group => field.type_name().to_string(),
        plain => plain.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    };
    // proto3 makes a oneof of each optional field; that one is nobody's choice.
    let group = field
        .oneof_index
        .filter(|_| !field.proto3_optional())
        .and_then(|index| message.oneof_decl.get(usize::try_from(index).ok()?))
        .map(|oneof| format!(" of {}", oneof.name()))
        .unwrap_or_default();
    format!("{label}{kind} {}{group}", field.name())
}

fn values(
    name: &str,
    old: &EnumDescriptorProto,
    new: &EnumDescriptorProto,
    found: &mut Vec<String>,
) {
    for value in &old.value {
        let (number, was) = (value.number(), value.name());
        let is = new.value.iter().find(|other| other.number() == number);
        match is.map(|is| is.name()) {
            Some(is) if is == was => {}
            Some(is) => found.push(format!("{name}: {number} was {was}, and is {is}")),
            None => found.push(format!("{name}: {was} = {number} is gone")),
        }
    }
}

fn call(method: &MethodDescriptorProto) -> String {
    let side = |is_stream, name: &str| match is_stream {
        true => format!("stream {name}"),
        false => name.to_string(),
    };
    let input = side(method.client_streaming(), method.input_type());
    let output = side(method.server_streaming(), method.output_type());
    format!("({input}) returns ({output})")
}
