package kube

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// PKI is what a cluster's servers show and believe. Its files are of the form that Kubernetes' programs take, all in one
// folder.
type PKI struct {
	// CAFile is what all certificates are verified with; TokenKey signs the tokens of service accounts.
	CAFile, TokenKey string

	dir string
	ca  *x509.Certificate
	key crypto.Signer
}

// Leaf is where a certificate and its key are.
type Leaf struct{ Cert, Key string }

// NewPKI makes a CA for a day, and the key of the tokens.
func NewPKI(dir string) (*PKI, error) {
	p := &PKI{dir: dir, CAFile: filepath.Join(dir, "ca.crt"), TokenKey: filepath.Join(dir, "sa.key")}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	p.key = key
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test cluster"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, key.Public(), key)
	if err != nil {
		return nil, err
	}
	if p.ca, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	if err := writePEM(p.CAFile, "CERTIFICATE", der); err != nil {
		return nil, err
	}
	tokens, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	return p, writePEM(p.TokenKey, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(tokens))
}

// Server makes the certificate of a server that is reached at these names and addresses.
func (p *PKI) Server(file string, subject pkix.Name, names ...string) (Leaf, error) {
	template := &x509.Certificate{Subject: subject, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	return p.leaf(file, template)
}

// Client makes the certificate of a user of these groups.
func (p *PKI) Client(file, user string, groups ...string) (Leaf, error) {
	return p.leaf(file, &x509.Certificate{
		Subject: pkix.Name{CommonName: user, Organization: groups}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

// Kubeconfig writes user.kubeconfig, with which the user of these groups reaches the API server at url, and returns its
// path. It needs no other file.
func (p *PKI) Kubeconfig(url, user string, groups ...string) (string, error) {
	file := strings.ReplaceAll(user, ":", "-")
	leaf, err := p.Client(file, user, groups...)
	if err != nil {
		return "", err
	}
	c := clientcmdapi.NewConfig()
	c.Clusters["c"] = &clientcmdapi.Cluster{Server: url, CertificateAuthority: p.CAFile}
	c.AuthInfos["u"] = &clientcmdapi.AuthInfo{ClientCertificate: leaf.Cert, ClientKey: leaf.Key}
	c.Contexts["c"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	c.CurrentContext = "c"
	if err := clientcmdapi.FlattenConfig(c); err != nil {
		return "", err
	}
	path := filepath.Join(p.dir, file+".kubeconfig")
	return path, clientcmd.WriteToFile(*c, path)
}

func (p *PKI) leaf(name string, template *x509.Certificate) (Leaf, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Leaf{}, err
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return Leaf{}, err
	}
	template.NotBefore, template.NotAfter = p.ca.NotBefore, p.ca.NotAfter
	template.KeyUsage = x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, p.ca, key.Public(), p.key)
	if err != nil {
		return Leaf{}, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Leaf{}, err
	}
	leaf := Leaf{Cert: filepath.Join(p.dir, name+".crt"), Key: filepath.Join(p.dir, name+".key")}
	if err := writePEM(leaf.Cert, "CERTIFICATE", der); err != nil {
		return Leaf{}, err
	}
	return leaf, writePEM(leaf.Key, "PRIVATE KEY", pkcs8)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
