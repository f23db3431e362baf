use crate::TrainError;
use offshoot_model::weights::GgufTokenizer;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

// Numbers in `tokenizer.ggml.token_type`.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// How text is cut into words before pairs are merged. GGUF only has the name of it, in
/// `tokenizer.ggml.pre`; what a name means is in llama.cpp's `llama-vocab.cpp` and in the
/// `tokenizer.json` of the model it was made for.
#[derive(Clone, Copy, PartialEq)]
enum PreTokenizer {
    /// GPT-2's words.
    Gpt2,
    /// Every digit alone, then GPT-2's words.
    DigitsThenGpt2,
    /// Llama 3's words: numbers of up to three digits.
    Llama3,
    /// Llama 3's words with every digit alone, on composed Unicode.
    Qwen2,
}

const BY_NAME: [(&str, PreTokenizer); 12] = [
    // Also what files without the field mean.
    ("default", PreTokenizer::Gpt2),
    ("gpt-2", PreTokenizer::Gpt2),
    ("olmo", PreTokenizer::Gpt2),
    ("smollm", PreTokenizer::DigitsThenGpt2),
    ("starcoder", PreTokenizer::DigitsThenGpt2),
    ("refact", PreTokenizer::DigitsThenGpt2),
    ("llama-bpe", PreTokenizer::Llama3),
    ("llama3", PreTokenizer::Llama3),
    ("llama-v3", PreTokenizer::Llama3),
    ("smaug-bpe", PreTokenizer::Llama3),
    ("qwen2", PreTokenizer::Qwen2),
    ("deepseek-r1-qwen", PreTokenizer::Qwen2),
];

const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl PreTokenizer {
    fn by_name(name: &str) -> Option<Self> {
        BY_NAME.iter().find(|(known, _)| *known == name).map(|(_, pre)| *pre)
    }

    fn build(self) -> tokenizers::Result<PreTokenizerWrapper> {
        let split = |words: &str| -> tokenizers::Result<PreTokenizerWrapper> {
            let pattern = SplitPattern::Regex(words.into());
            let words = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
            let bytes = ByteLevel::new(false, true, false);
            Ok(Sequence::new(vec![words.into(), bytes.into()]).into())
        };
        let gpt2 = ByteLevel::new(false, true, true);
        match self {
            PreTokenizer::Gpt2 => Ok(gpt2.into()),
            PreTokenizer::DigitsThenGpt2 => {
                Ok(Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into())
            }
            PreTokenizer::Llama3 => split(LLAMA3_WORDS),
            PreTokenizer::Qwen2 => split(QWEN2_WORDS),
        }
    }
}

/// A byte-level BPE tokenizer from GGUF metadata.
pub(super) fn build(metadata: &GgufTokenizer, origin: &str) -> Result<Tokenizer, TrainError> {
    let wrong = |problem| TrainError::Tokenizer { origin: origin.into(), problem };
    if metadata.model != "gpt2" {
        return Err(wrong(format!(
            "tokenizer.ggml.model is \"{}\"; from GGUF only byte-level BPE (\"gpt2\") is read. Use the model's Hugging Face directory, which has a tokenizer.json",
            metadata.model
        )));
    }
    let name = metadata.pre.as_str();
    let pre = PreTokenizer::by_name(name).ok_or_else(|| {
        let known: Vec<&str> = BY_NAME.iter().map(|(name, _)| *name).collect();
        wrong(format!(
            "tokenizer.ggml.pre is \"{name}\"; known are {}. Use the model's Hugging Face directory, which has a tokenizer.json",
            known.join(", ")
        ))
    })?;
    assemble(metadata, pre, &wrong)
}

fn assemble(
    metadata: &GgufTokenizer,
    pre: PreTokenizer,
    wrong: &dyn Fn(String) -> TrainError,
) -> Result<Tokenizer, TrainError> {
    let library = |e: tokenizers::Error| wrong(e.to_string());
    let vocab: tokenizers::models::bpe::Vocab =
        metadata.tokens.iter().cloned().zip(0u32..).collect();
    let merge = |line: &String| {
        let pair = line.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string()));
        pair.ok_or_else(|| wrong(format!("the merge \"{line}\" is not two tokens and a space")))
    };
    let merges = metadata.merges.iter().map(merge).collect::<Result<Vec<_>, _>>()?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        // Llama 3 has whole words in its vocabulary that its merges do not reach.
        .ignore_merges(pre == PreTokenizer::Llama3)
        .build()
        .map_err(library)?;

    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(pre.build().map_err(library)?));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    if pre == PreTokenizer::Qwen2 {
        tokenizer.with_normalizer(Some(NFC)).map_err(library)?;
    }
    for (token, &kind) in metadata.tokens.iter().zip(&metadata.token_types) {
        let added = AddedToken::from(token.clone(), kind == CONTROL).normalized(false);
        match kind {
            CONTROL => tokenizer.add_special_tokens([added]).map_err(library)?,
            USER_DEFINED => tokenizer.add_tokens([added]).map_err(library)?,
            _ => 0,
        };
    }
    if let Some((bos, id)) = bos_in_front(metadata) {
        let template = TemplateProcessing::builder()
            .try_single(format!("{bos} $A"))
            .map_err(wrong)?
            .special_tokens(vec![(bos, id)])
            .build()
            .map_err(|e| wrong(e.to_string()))?;
        tokenizer.with_post_processor(Some(template));
    }
    Ok(tokenizer)
}

fn bos_in_front(metadata: &GgufTokenizer) -> Option<(String, u32)> {
    let id = metadata.bos_token_id.filter(|_| metadata.add_bos_token)?;
    Some((metadata.tokens.get(id as usize)?.clone(), id))
}
