// Package lint says whether a certificate that is about to be signed would break a rule of SPIFFE or RFC 5280.
//
// Two sets of lints, at two prices. Our own look at the template alone and run for every issuance: one lint, one rule,
// one citation. zlint's RFC 5280, 5480 and 8813 sets need a certificate, so a throwaway key signs one; that runs once
// for each shape: what two certificates have in common that differ in nothing but values. Our own lints look at the
// values.
package lint
