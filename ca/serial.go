package ca

import (
	"encoding/hex"
	"math/big"
)

// SerialString is how serials are written everywhere for people and programs: lower-case hex, whole bytes, at least the
// 32 digits of our own 128-bit serials, so that leading zeros do not make two spellings of one.
func SerialString(n *big.Int) string {
	size := max(serialBytes, (n.BitLen()+7)/8)
	return hex.EncodeToString(n.FillBytes(make([]byte, size)))
}
