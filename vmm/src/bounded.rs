//! Sequences of saved state whose length is checked while they are read: what comes from outside is never allocated for
//! before it is known to be possible.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

/// For `#[serde(deserialize_with = "at_most::<_, _, MAX>")]`: a vector of `MAX` elements at most.
///
/// # Errors
/// When there are more, or one of them cannot be read.
pub fn at_most<'de, D: Deserializer<'de>, T: Deserialize<'de>, const MAX: usize>(from: D) -> Result<Vec<T>, D::Error> {
    struct Sequence<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Sequence<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{MAX} elements at most")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<T>, A::Error> {
            let said = sequence.size_hint().unwrap_or(0);
            if said > MAX {
                return Err(A::Error::custom(format_args!("{said} elements, {MAX} are possible")));
            }
            // The length is a claim: memory follows what has come.
            let mut elements = Vec::with_capacity(said.min(4096 / size_of::<T>().max(1)));
            while let Some(element) = sequence.next_element()? {
                if elements.len() == MAX {
                    return Err(A::Error::custom(format_args!("more than {MAX} elements")));
                }
                elements.push(element);
            }
            Ok(elements)
        }
    }

    from.deserialize_seq(Sequence::<T, MAX>(PhantomData))
}

/// `N` bytes, no more and no fewer. Serde's own arrays end at 32.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block<const N: usize>(pub Box<[u8; N]>);

impl<const N: usize> Serialize for Block<N> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(self.0.iter())
    }
}

impl<'de, const N: usize> Deserialize<'de> for Block<N> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let bytes: Box<[u8]> = at_most::<D, u8, N>(from)?.into();
        let found = bytes.len();
        let exact = bytes.try_into();
        exact.map(Self).map_err(|_| D::Error::custom(format_args!("{found} bytes instead of {N}")))
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize as Derive;

    use super::*;

    #[derive(Debug, PartialEq, Derive)]
    struct Few(#[serde(deserialize_with = "at_most::<_, _, 3>")] Vec<u16>);

    #[test]
    fn as_many_as_are_possible() {
        let bytes = |count: u8| postcard::to_stdvec(&vec![7_u16; count.into()]).unwrap();
        assert_eq!(postcard::from_bytes::<Few>(&bytes(3)), Ok(Few(vec![7; 3])));
        assert!(postcard::from_bytes::<Few>(&bytes(4)).is_err());
        // A length alone, of more than there can be memory for.
        assert!(postcard::from_bytes::<Few>(&[0xff, 0xff, 0xff, 0xff, 0x0f]).is_err());
        assert!(serde_json::from_str::<Few>("[1,2,3]").is_ok());
        assert!(serde_json::from_str::<Few>("[1,2,3,4]").is_err());
    }

    #[test]
    fn a_block_is_as_long_as_it_says() {
        let block = Block(Box::new([5; 40]));
        let bytes = postcard::to_stdvec(&block).unwrap();
        assert_eq!(postcard::from_bytes::<Block<40>>(&bytes).unwrap(), block);
        assert!(postcard::from_bytes::<Block<39>>(&bytes).is_err());
        assert!(postcard::from_bytes::<Block<41>>(&bytes).is_err());
    }
}
