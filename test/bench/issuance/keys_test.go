package issuance

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/test/parts"
)

func newCSR(b *testing.B) (*ecdsa.PrivateKey, []byte) {
	b.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(b, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	check(b, err)
	return key, der
}

func (w *setup) selfSigned(b *testing.B, key *ecdsa.PrivateKey) []byte {
	b.Helper()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}, &x509.Certificate{}, &key.PublicKey, key)
	check(b, err)
	return der
}

// freePort finds a loopback port that was free a moment ago.
func freePort(b *testing.B) int {
	b.Helper()
	port, err := parts.FreePort()
	check(b, err)
	return port
}

// address is where the configuration says that the CA listens.
func (w *setup) address(b *testing.B) string {
	b.Helper()
	config, err := os.ReadFile(w.config())
	check(b, err)
	found := regexp.MustCompile(`listen: (\S+)`).FindSubmatch(config)
	if found == nil {
		b.Fatal("the configuration names no address")
	}
	return string(found[1])
}

// cpuOf is the CPU time that a process has spent (proc(5): utime and stime, in clock ticks of 10 ms).
func cpuOf(b *testing.B, pid int) time.Duration {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	check(b, err)
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		check(b, err)
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

func check(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}
