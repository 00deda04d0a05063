// Package serial spells the serial numbers of certificates, so that all that is printed, logged and asked for agrees.
package serial

import (
	"encoding/hex"
	"fmt"
	"math/big"
	"strings"
)

// ownBytes is the size of our own serials: 128 random bits. RFC 5280 §4.1.2.2 allows 20 octets.
const ownBytes = 16

// String is how a serial is written for people and programs: lower-case hex, whole bytes, at least the 32 digits of our own,
// so that leading zeros do not make two spellings of one. Empty for nil.
func String(n *big.Int) string {
	if n == nil {
		return ""
	}
	size := max(ownBytes, (n.BitLen()+7)/8)
	return hex.EncodeToString(n.FillBytes(make([]byte, size)))
}

// Parse reads a serial as people copy it, and returns it as String has it; empty for an empty text. openssl prints upper case
// and colons, Envoy and others leave leading zeros out.
func Parse(text string) (string, error) {
	if text == "" {
		return "", nil
	}
	digits := strings.TrimPrefix(strings.ToLower(strings.ReplaceAll(text, ":", "")), "0x")
	significant := strings.TrimLeft(digits, "0")
	if len(significant) > 2*20 {
		return "", fmt.Errorf("serial %.64q is longer than 20 octets (RFC 5280 section 4.1.2.2)", text)
	}
	octets, err := hex.DecodeString(strings.Repeat("0", len(significant)%2) + significant)
	if err != nil || digits == "" {
		return "", fmt.Errorf("serial %.64q is not hexadecimal", text)
	}
	return String(new(big.Int).SetBytes(octets)), nil
}
