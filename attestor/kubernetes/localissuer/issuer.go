// Package localissuer issues service-account tokens in the form in which a Kubernetes API server issues them, under a
// key of its own. `meshca dev` stands on it where there is no cluster: the tokens go through the very verification that
// a cluster's tokens go through. Whoever holds its key can be any workload, so it belongs to development and tests.
package localissuer

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

const keyFile = "token-key.pem"

// Issuer signs tokens with RS256, as API servers do by default. It is safe for concurrent use.
type Issuer struct {
	// URL is the tokens' `iss`.
	URL    string
	key    *rsa.PrivateKey
	keyID  string
	signer jose.Signer
}

// Subject is who a token is for and what it is bound to: the claims under `kubernetes.io`, and `sub`.
type Subject struct {
	Namespace, ServiceAccount, ServiceAccountUID string
	Pod, PodUID                                  string
	Node, NodeUID                                string
}

// Open reads the issuer's key from dir, or makes one there (mode 0600). A key that is there is never replaced.
func Open(dir, url string) (*Issuer, error) {
	path := filepath.Join(dir, keyFile)
	data, err := read(path)
	if errors.Is(err, fs.ErrNotExist) {
		data, err = create(path)
	}
	if err != nil {
		return nil, fmt.Errorf("token key: %w", err)
	}
	key, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("token key: %s %w: remove it and a new one is made, which ends the tokens signed with the old one", path, err)
	}
	return New(key, url)
}

// read refuses a key that others can use: with it they can be any workload.
func read(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %04o, so others than its owner can use it. Run: chmod 600 %s", path, info.Mode().Perm(), path)
	}
	return os.ReadFile(path)
}

func parse(data []byte) (*rsa.PrivateKey, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("holds no PEM block")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("holds no PKCS #8 key") // not what the parser says: it may repeat parts of the file
	}
	key, ok := parsed.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("holds a %T, not an RSA key", parsed)
	}
	return key, nil
}

// New returns an Issuer that signs with key.
func New(key *rsa.PrivateKey, url string) (*Issuer, error) {
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	// The key id is the digest of the public key, as API servers make it.
	sum := sha256.Sum256(spki)
	i := &Issuer{URL: url, key: key, keyID: base64.RawURLEncoding.EncodeToString(sum[:])}
	i.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: i.keyID}}, nil)
	return i, err
}

func create(path string) ([]byte, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	data := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	return data, os.WriteFile(path, data, 0o600)
}

// JWKS is the issuer's key set, RFC 7517 §5.
func (i *Issuer) JWKS() ([]byte, error) {
	return json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: &i.key.PublicKey, KeyID: i.keyID, Algorithm: string(jose.RS256), Use: "sig"},
	}})
}

type claims struct {
	Audience   []string  `json:"aud"`
	Expiry     int64     `json:"exp"`
	IssuedAt   int64     `json:"iat"`
	NotBefore  int64     `json:"nbf"`
	Issuer     string    `json:"iss"`
	ID         string    `json:"jti"`
	Subject    string    `json:"sub"`
	Kubernetes k8sClaims `json:"kubernetes.io"`
}

type k8sClaims struct {
	Namespace      string `json:"namespace"`
	Node           *ref   `json:"node,omitempty"`
	Pod            *ref   `json:"pod,omitempty"`
	ServiceAccount ref    `json:"serviceaccount"`
}

type ref struct {
	Name string `json:"name"`
	UID  string `json:"uid"`
}

// Token signs a token for this audience that lives for ttl from now.
func (i *Issuer) Token(s Subject, audience string, ttl time.Duration) (string, error) {
	now := time.Now()
	c := claims{
		Audience: []string{audience}, Issuer: i.URL, ID: newUUID(),
		IssuedAt: now.Unix(), NotBefore: now.Unix(), Expiry: now.Add(ttl).Unix(),
		Subject:    "system:serviceaccount:" + s.Namespace + ":" + s.ServiceAccount,
		Kubernetes: k8sClaims{Namespace: s.Namespace, ServiceAccount: ref{s.ServiceAccount, s.ServiceAccountUID}},
	}
	if s.Pod != "" {
		c.Kubernetes.Pod = &ref{s.Pod, s.PodUID}
	}
	if s.Node != "" {
		c.Kubernetes.Node = &ref{s.Node, s.NodeUID}
	}
	return jwt.Signed(i.signer).Claims(c).Serialize()
}

// newUUID is a random UUID (RFC 9562 §5.4), as API servers put into `jti`.
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
