package kubernetes

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha256" // the hashes of the algorithms below
	_ "crypto/sha512"
	"encoding/base64"
	"math/big"
	"strings"

	"github.com/go-jose/go-jose/v4/json"

	"github.com/meshca/meshca/api/refusal"
)

// maxToken is the size in bytes up to which a token is looked at.
const maxToken = 16 << 10

// jws is a signed JWT in compact form (RFC 7515 §7.1), taken apart. Nothing in it is verified.
//
// go-jose would parse it too, but it parses whatever keys and certificates a stranger puts into the header, and costs as
// much again as verifying RS256. Its strict JSON (exact names, no duplicates) is used, and the tests compare with it.
type jws struct {
	alg, kid  string
	signed    string // header and payload, as they were signed
	payload   []byte
	signature []byte
}

// header is what is read of a JOSE header. Names are matched exactly and may not be repeated.
type header struct {
	Alg  string          `json:"alg"`
	Kid  string          `json:"kid"`
	Crit json.RawMessage `json:"crit"`
}

// algorithm is one of those that API servers sign with (KEP-740 and kube-apiserver --service-account-signing-key-file).
type algorithm struct {
	hash crypto.Hash
	// curve is nil for RSASSA-PKCS1-v1_5.
	curve elliptic.Curve
}

// algorithmOf knows the closed list. There is no PS256 in it: no API server uses it.
func algorithmOf(alg string) (algorithm, bool) {
	switch alg {
	case "RS256":
		return algorithm{crypto.SHA256, nil}, true
	case "RS384":
		return algorithm{crypto.SHA384, nil}, true
	case "RS512":
		return algorithm{crypto.SHA512, nil}, true
	case "ES256":
		return algorithm{crypto.SHA256, elliptic.P256()}, true
	case "ES384":
		return algorithm{crypto.SHA384, elliptic.P384()}, true
	case "ES512":
		return algorithm{crypto.SHA512, elliptic.P521()}, true
	}
	return algorithm{}, false
}

// parseJWS takes a token apart, and refuses what cannot be a service-account token at the least cost there is.
func parseJWS(token string) (jws, *refusal.Error) {
	if token == "" {
		return jws{}, refusal.New(refusal.TokenMissing, "no token was presented")
	}
	if len(token) > maxToken {
		return jws{}, refusal.New(refusal.TokenTooLarge, "the token has %d bytes, at most %d are looked at", len(token), maxToken)
	}
	switch dots := strings.Count(token, "."); {
	case dots == 4:
		return jws{}, refusal.New(refusal.TokenEncrypted, "the token has the five parts of a JWE")
	case dots != 2:
		return jws{}, refusal.New(refusal.TokenMalformed, "the token has %d parts where a signed JWT has 3", dots+1)
	case strings.Contains(token, "\n"), strings.Contains(token, "\r"): // the decoder would skip them
		return jws{}, refusal.New(refusal.TokenMalformed, "the token holds a line break")
	}
	head, rest, _ := strings.Cut(token, ".")
	body, sig, _ := strings.Cut(rest, ".")
	h, ok := parseHeader(head)
	if !ok {
		return jws{}, refusal.New(refusal.TokenMalformed, "the token's header is not a JSON object in base64url")
	}
	if _, ok := algorithmOf(h.Alg); !ok {
		return jws{}, refusal.New(refusal.TokenAlgorithm, "the token's algorithm is %s", quoted(h.Alg)).On("alg")
	}
	if h.Crit != nil {
		return jws{}, refusal.New(refusal.TokenMalformed, "the token's header names critical extensions, and none is understood (RFC 7515 §4.1.11)").On("crit")
	}
	payload, err := decodeSegment(body)
	if err != nil {
		return jws{}, refusal.New(refusal.TokenMalformed, "the token's payload is not base64url")
	}
	signature, err := decodeSegment(sig)
	if err != nil {
		return jws{}, refusal.New(refusal.TokenMalformed, "the token's signature is not base64url")
	}
	return jws{alg: h.Alg, kid: h.Kid, signed: token[:len(head)+1+len(body)], payload: payload, signature: signature}, nil
}

func parseHeader(segment string) (header, bool) {
	raw, err := decodeSegment(segment)
	if err != nil {
		return header{}, false
	}
	h, ok := plainHeader(raw)
	if !ok {
		h = header{}
		ok = json.Unmarshal(raw, &h) == nil
	}
	return h, ok
}

// decodeSegment is strict: one text for one value (RFC 4648 §3.5).
func decodeSegment(s string) ([]byte, error) {
	return base64.RawURLEncoding.Strict().DecodeString(s)
}

// verify tells whether key made the signature with the algorithm that the header names. A key is good for one kind of
// algorithm: an RSA key for RS*, a curve for its own ES*, so that nothing in the token chooses how it is verified.
func (j jws) verify(key crypto.PublicKey) bool {
	a, ok := algorithmOf(j.alg)
	if !ok {
		return false
	}
	h := a.hash.New()
	h.Write([]byte(j.signed))
	digest := h.Sum(nil)
	switch key := key.(type) {
	case *rsa.PublicKey:
		return a.curve == nil && rsa.VerifyPKCS1v15(key, a.hash, digest, j.signature) == nil
	case *ecdsa.PublicKey:
		if a.curve == nil || key.Curve != a.curve {
			return false
		}
		size := (a.curve.Params().BitSize + 7) / 8 // RFC 7518 §3.4: r and s, each of the curve's size
		if len(j.signature) != 2*size {
			return false
		}
		r, s := new(big.Int).SetBytes(j.signature[:size]), new(big.Int).SetBytes(j.signature[size:])
		return ecdsa.Verify(key, digest, r, s)
	}
	return false
}

// quoted prints a stranger's text: short, and without what could break a line.
func quoted(s string) string {
	const most = 64
	cut := ""
	if len(s) > most {
		s, cut = s[:most], "…"
	}
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		if r < 0x20 || r > 0x7e || r == '"' || r == '\\' {
			r = '?'
		}
		b.WriteRune(r)
	}
	b.WriteString(cut)
	b.WriteByte('"')
	return b.String()
}
