package ca

import (
	"crypto/rsa"
	"math/big"
	"strings"
	"testing"

	"github.com/meshca/meshca/api/refusal"
)

// One caller could bring thousands of sizes, each of which would have to be linted whole.
func TestCheckKeyKnowsThreeSizesOfRSA(t *testing.T) {
	var accepted []int
	for bits := 1024; bits <= 8192; bits++ {
		n := new(big.Int).SetBit(big.NewInt(1), bits-1, 1)
		err := CheckKey(&rsa.PublicKey{N: n, E: 65537})
		if err == nil {
			accepted = append(accepted, bits)
			continue
		}
		wantReason(t, err, refusal.CSRKey)
		for _, size := range []string{"2048", "3072", "4096"} {
			if !strings.Contains(err.Error(), size) {
				t.Fatalf("%d bits: the refusal does not name %s: %v", bits, size, err)
			}
		}
	}
	if len(accepted) != 3 || accepted[0] != 2048 || accepted[1] != 3072 || accepted[2] != 4096 {
		t.Errorf("%d sizes are accepted, the first of them %v", len(accepted), accepted[:min(len(accepted), 5)])
	}
}
