// The phone's side in an Android app, with org.pytorch:pytorch_android_lite (1.13.1 or 2.1.0) and the exported file
// among the assets. Written against the library's interface; it has not been run on a device.

import android.content.res.AssetManager
import android.graphics.Bitmap
import java.io.ByteArrayOutputStream
import java.net.Socket
import kotlin.math.roundToInt
import org.pytorch.*

class Phone(assets: AssetManager) {
    private val generator: Module = LiteModuleLoader.loadModuleFromAsset(assets, "generator.ptl")  // once

    // Shrink the picture to the size that the classifier takes first, 32 x 32: the generator hides at that size.
    // The file normalises by itself: whoever uses TensorImageUtils passes mean (0, 0, 0) and deviation (1, 1, 1).
    fun protect(picture: Bitmap): Bitmap {
        val small = Bitmap.createScaledBitmap(picture, 32, 32, true)
        val n = 32 * 32
        val pixels = IntArray(n).also { small.getPixels(it, 0, 32, 0, 0, 32, 32) }
        val x = FloatArray(3 * n) { (pixels[it % n] shr (16 - 8 * (it / n)) and 255) / 255f }  // all R, all G, all B
        val y = generator.forward(IValue.from(Tensor.fromBlob(x, longArrayOf(1, 3, 32, 32)))).toTensor().dataAsFloatArray
        fun level(i: Int) = (y[i] * 255).roundToInt()
        for (i in 0 until n) pixels[i] = (255 shl 24) or (level(i) shl 16) or (level(n + i) shl 8) or level(2 * n + i)
        return Bitmap.createBitmap(pixels, 32, 32, Bitmap.Config.ARGB_8888)
    }
}

// Off the main thread: the class, 0 to 9; negative if the service refused the picture.
fun recognise(picture: Bitmap, host: String, port: Int): Int = Socket(host, port).use {
    val png = ByteArrayOutputStream().also { picture.compress(Bitmap.CompressFormat.PNG, 100, it) }.toByteArray()
    it.getOutputStream().write(png.size.toString().padEnd(16).toByteArray() + png)
    it.getInputStream().read() - '0'.code
}
